"""Lets a stock SGLang wheel be imported where its CUDA-only dependencies are missing.

SGLang on the CPU never calls triton, torchvision or sgl_kernel, but its modules import them at the top. A finder of
last resort hands out inert stand-ins for these names alone, and only to real `import` statements: a probe by
`importlib.util.find_spec` still hears that they are missing, so that transformers and torch do without them.

`make sglang-cpu` puts this folder on the path of the environment that it makes; nothing else knows of it.
"""

import importlib.machinery
import sys
import types
from typing import Any

FP8_LAYERS = "sglang.srt.layers.quantization.fp8"
STOOD_IN = frozenset({"triton", "torchvision", "sgl_kernel"})


class _StandInClass(type):
    """A class whose missing attributes are stand-ins: `class Config(triton.Config)` and `x: tl.tensor` work."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(f"{cls.__module__}.{cls.__name__}.{name}")


class StandIn(types.ModuleType):
    """A module that has every attribute. Called as a decorator, it returns what it decorates."""

    __version__ = "0.0.0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__file__ = None
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        value = _class(name, self.__name__) if name[:1].isupper() else _stand_in(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decorates = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if decorates else lambda decorated: decorated

    def __getitem__(self, key: Any) -> "StandIn":
        return self

    def __or__(self, other: Any) -> "StandIn":
        return self

    __ror__ = __or__

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Any:
        return iter(())


def _class(name: str, module: str) -> type:
    def accept(self: Any, *args: Any, **kwargs: Any) -> None:
        """Any arguments."""

    def accept_subclass(cls: type, **kwargs: Any) -> None:
        """Any keywords."""

    members = {"__module__": module, "__init__": accept, "__init_subclass__": classmethod(accept_subclass)}
    return _StandInClass(name, (), members)


def _stand_in(name: str) -> Any:
    return sys.modules.get(name) or StandIn(name)


class _Constexpr:
    """triton.language.constexpr, which modules make at import."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


class _TritonConfig:
    """triton.Config, which modules make and read at import."""

    def __init__(self, kwargs: Any = None, num_warps: int = 4, num_stages: int = 2, **_: Any) -> None:
        self.kwargs, self.num_warps, self.num_stages = kwargs or {}, num_warps, num_stages


class Loader:
    """Makes stand-ins; gives triton the little that is computed with at import."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        """The module of a spec."""
        return _stand_in(spec.name)

    def exec_module(self, module: Any) -> None:
        """Fill it in."""
        if module.__name__ == "triton":
            module.cdiv = lambda a, b: -(a // -b)
            module.next_power_of_2 = lambda n: 1 << (n - 1).bit_length() if n > 0 else 1
            module.Config = _TritonConfig
        if module.__name__ == "triton.language":
            module.constexpr, module.dtype = _Constexpr, type("dtype", (), {})


class Finder:
    """Asked last, when nothing real was found."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """A stand-in's spec for an import; None for other names and for probes."""
        if name.partition(".")[0] not in STOOD_IN or ("." not in name and _is_probe()):
            return None
        return importlib.machinery.ModuleSpec(name, Loader(), is_package=True)


def _is_probe() -> bool:
    """Whether the finder was asked by `importlib.util.find_spec`."""
    frame = sys._getframe(2)
    while frame is not None and "importlib._bootstrap" in frame.f_code.co_filename:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_filename.endswith("importlib/util.py")


class Fp8Finder:
    """Lets SGLang compute with FP8 weights on a CPU without AMX, where it ends once it has loaded them.

    Its own code makes and fills the parameters; they stay as they were loaded, and products are taken with the floats
    that they stand for.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of SGLang's FP8 layers, changed once they are loaded; None for all else."""
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == FP8_LAYERS else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.Fp8LinearMethod.process_weights_after_loading = lambda method, layer: None
            module.Fp8LinearMethod.apply = _float_product

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _float_product(method: Any, layer: Any, x: Any, bias: Any = None) -> Any:
    from torch.nn.functional import linear

    rows, columns = layer.weight.shape
    block_rows, block_columns = method.quant_config.weight_block_size
    scale = layer.weight_scale_inv.repeat_interleave(block_rows, 0)[:rows]
    scale = scale.repeat_interleave(block_columns, 1)[:, :columns]
    return linear(x, (layer.weight.float() * scale).to(x.dtype), bias)


def install() -> None:
    """Have the finders asked. Twice is once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Fp8Finder())  # type: ignore[arg-type]
        sys.meta_path.append(Finder())  # type: ignore[arg-type]
