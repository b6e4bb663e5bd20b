"""`fapo convert` for those who look for converters here: `python tools/convert.py SOURCE --to FOLDER`."""

import typer

from megatron_fapo.cli.convert import command

if __name__ == "__main__":
    typer.run(command)
