"""Settings of a group of generation servers. Light: no torch, no HTTP library."""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from megatron_fapo.errors import ConfigError
from megatron_fapo.settings import Settings

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class SGLangSettings(Settings):
    """How SGLang is started, where `engine` is `sglang`."""

    python: str = ".venvs/sglang/bin/python"
    """Python of the environment that SGLang is installed in; it is never the one of training."""
    on_cpu: bool = False
    """Compute on the CPU (--device cpu), where SGLang ignores seeds; `make sglang-cpu` makes such an environment."""
    tensor_parallel: Positive = 1
    """Ranks of one server (--tp-size)."""
    first_gpu: Annotated[int, Field(ge=0)] | None = None
    """GPU of the first server (--base-gpu-id), the next ones follow; null: as `cluster.placement` has it."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of the device's memory for weights and KV cache (--mem-fraction-static)."""
    max_total_tokens: Positive | None = None
    """Tokens in the KV cache (--max-total-tokens); null takes what the memory allows."""
    memory_saver: bool = False
    """Let the server give memory back between phases (--enable-memory-saver); for training on the same device."""
    arguments: tuple[str, ...] = ()
    """Further arguments of `sglang.launch_server`, as they are written on its command line."""


class EndpointSettings(Settings):
    """A model that others serve behind OpenAI's chat completions, in place of servers of the run's own.

    Its weights stay as they are, and its reproducibility is its operator's.
    """

    endpoint: str
    """URL up to `/v1`."""
    model: str
    """The model's name there."""
    api_key_env: str | None = None
    """Environment variable that holds the key; null sends none."""
    timeout: Seconds = 600.0
    """Seconds for one answer."""
    retries: Annotated[int, Field(ge=0)] = 5
    """Further attempts where the endpoint is busy (429), fails (5xx) or cannot be reached, each after twice the wait of
    the one before, or after what its Retry-After says."""

    @field_validator("endpoint")
    @classmethod
    def _is_a_url(cls, endpoint: str) -> str:
        if not endpoint.startswith(("http://", "https://")):
            raise ValueError("must be a URL, http:// or https://, up to /v1")
        return endpoint

    def api_key(self) -> str | None:
        """The key, from the environment. Raises ConfigError when the variable is not set."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise ConfigError(f"servers.judge.api_key_env: the environment variable {self.api_key_env} is not set")
        return key


class SharedSettings(Settings):
    """The judge is the policy itself, as it is at each step: its verdicts are asked of the policy's servers, at a lower
    priority than rollouts."""

    shares: Literal["policy"]
    """Whose servers."""


class ServerSettings(Settings):
    """One role's servers: what they serve, where they listen, how much they hold."""

    engine: Literal["embedded", "sglang"] = "embedded"
    """Which engine answers: `embedded` runs the model inside our own server process, `sglang` is SGLang."""
    sglang: SGLangSettings = SGLangSettings()
    """How SGLang is started."""
    model: str
    """Folder of a Hugging Face causal language model (config.json and safetensors)."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs `api_key_file`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the first server, the next ones follow it; 0 lets the system pick free ones."""
    count: Positive = 1
    """Server processes in the group."""
    max_count: Positive | None = None
    """Server processes that the group may be given while the run goes on (`fapo servers`): ports and GPUs are kept for
    so many. null: `count`."""
    lend: Annotated[int, Field(ge=0)] = 0
    """Of these servers, how many lend their devices to the other role while that has more to do, and take what it lends
    (docs/colocation.md). Needs `cluster.placement: colocated`; the other role's weights must fit beside
    `sglang.memory_fraction`."""
    threads: Positive = 1
    """CPU threads of each server."""
    max_running: Positive = 256
    """Samples that one server generates at the same time (SGLang: --max-running-requests)."""
    context_length: Positive = 4096
    """Most tokens of prompt and answer together, or the model's own limit if lower (SGLang: --context-length)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and arithmetic."""
    quantization: Literal["fp8"] | None = None
    """The model's folder is FP8 (`fapo convert --quantize fp8`), and a policy's weights are published in that form.
    Needs engine sglang and dtype bfloat16. With the policy's servers in FP8, `algorithm.loss.importance` is on unless
    it is set otherwise."""
    deterministic: bool = False
    """Give the same bytes whatever else is in the batch (SGLang: --enable-deterministic-inference)."""
    weights_cpu_backup: bool = False
    """Keep the weights aside while their memory is released, so that resuming needs no update."""
    priorities: bool = False
    """Let what has a higher priority go first (SGLang: --enable-priority-scheduling; the embedded engine always does).
    The run sets it where its judge shares these servers."""
    api_key_file: str | None = None
    """File holding the key that clients must send as `Authorization: Bearer KEY`."""
    start_timeout: Seconds = 300.0
    """Seconds until a started server must be healthy."""
    request_timeout: Seconds = 600.0
    """Seconds that a client waits between two pieces of an answer."""
    deadline: Seconds = 3600.0
    """Seconds from a request's start until all its samples are there, waiting for servers and retries included."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """Times that each server is started again after it died; then the group goes on without it. Never where ranks and
    servers share devices (cluster.placement colocated): the ranks cannot give the weights while servers generate."""
    health_interval: Seconds = 10.0
    """Seconds between two looks at a server's /health."""
    health_deadline: Seconds = 60.0
    """Seconds in which /health must answer; a server that does not is killed and started again."""
    router: Literal["none", "sglang"] = "none"
    """What spreads the requests: our client, or SGLang's router in a process of its own (`pip install
    megatron-fapo[router]`)."""

    @model_validator(mode="after")
    def _fits_the_device(self) -> Self:
        if self.engine == "sglang" and self.sglang.on_cpu and self.deterministic:
            raise ValueError("engine sglang on the cpu ignores seeds: a deterministic run needs engine embedded")
        if self.sglang.memory_saver and self.sglang.on_cpu:
            raise ValueError("sglang.memory_saver needs a GPU: leave sglang.on_cpu out")
        return self

    @model_validator(mode="after")
    def _fp8_has_an_engine(self) -> Self:
        if self.quantization is not None and self.engine == "embedded":
            raise ValueError("quantization fp8: the embedded engine computes in floats; it needs engine sglang")
        if self.quantization is not None and self.dtype != "bfloat16":
            raise ValueError(f"quantization fp8 with dtype {self.dtype}: SGLang multiplies FP8 into BF16; set bfloat16")
        return self

    @model_validator(mode="after")
    def _reachable_only_with_a_key(self) -> Self:
        if not is_loopback(self.host) and self.api_key_file is None:
            raise ValueError(
                f"host {self.host!r} is reachable from other machines: set api_key_file, or host 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _has_room_for_its_servers(self) -> Self:
        if self.max_count is not None and self.max_count < self.count:
            raise ValueError(f"max_count = {self.max_count} is less than count = {self.count}")
        return self

    @property
    def places(self) -> int:
        """Servers that ports and GPUs are kept for."""
        return self.max_count or self.count

    def ports(self, guests: int = 0) -> list[int]:
        """Of all of them, where they are fixed, and of so many on devices of the other role."""
        return [self.port + place for place in range(self.places + guests)] if self.port else []

    @property
    def gpus(self) -> int:
        """GPUs of one server."""
        return self.sglang.tensor_parallel if self.engine == "sglang" and not self.sglang.on_cpu else 0

    def on_gpus_from(self, first: int) -> Self:
        """The same servers on the GPUs from `first` on, where they need any and nobody has said which."""
        if not self.gpus or self.sglang.first_gpu is not None:
            return self
        return self.changed(sglang=self.sglang.changed(first_gpu=first))

    def api_key(self) -> str | None:
        """The key, read from its file. Raises ConfigError when the file is missing or empty."""
        if self.api_key_file is None:
            return None
        try:
            key = Path(self.api_key_file).read_text().strip()
        except OSError as error:
            raise ConfigError(f"api_key_file {self.api_key_file}: {error.strerror}") from None
        if not key:
            raise ConfigError(f"api_key_file {self.api_key_file}: is empty")
        return key
