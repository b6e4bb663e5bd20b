"""Lets a stock SGLang wheel be imported where its CUDA-only dependencies are missing.

SGLang on the CPU never calls triton, torchvision or sgl_kernel, but its modules import them at the top. A finder of
last resort hands out inert stand-ins for these names alone, and only to real `import` statements: a probe by
`importlib.util.find_spec` still hears that they are missing, so that transformers and torch do without them.

`make sglang-cpu` puts this folder on the path of the environment that it makes; nothing else knows of it.
"""

import importlib.machinery
import sys
import types
from types import SimpleNamespace
from typing import Any

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


class ChangingFinder:
    """Changes what SGLang's CPU path cannot do, once the module is loaded: `CHANGES`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of such a module; None for all else."""
        change = CHANGES.get(name)
        spec = None if change is None else importlib.machinery.PathFinder.find_spec(name, path)
        if change is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _compute_fp8(module: Any) -> None:
    """FP8 weights on a CPU without AMX, where SGLang ends once it has loaded them.

    Its own code makes and fills the parameters; they stay as they were loaded, and products are taken with the floats
    that they stand for.
    """
    for kind in (module.Fp8LinearMethod, module.Fp8MoEMethod):
        kind.process_weights_after_loading = lambda method, layer: None
    module.Fp8LinearMethod.apply = _float_product
    module.Fp8MoEMethod.create_moe_runner = _keep_runner_config
    module.Fp8MoEMethod.apply = _float_experts


def _leave_out_other_experts(module: Any) -> None:
    """Experts that other ranks hold, which SGLang's dispatcher marks with -1, and its CPU forward takes for a place."""
    native = module.moe_forward_native

    def moe_forward_native(layer: Any, x: Any, topk_output: Any, config: Any) -> Any:
        weights, ids, rest = topk_output
        elsewhere, own, most = ids < 0, len(layer.w13_weight), ids.shape[1]
        # Each in a row goes to another expert, since they are counted row by row; they weigh nothing.
        places = ids.where(~elsewhere, own + ids.new_tensor(range(most)))
        enough = SimpleNamespace(
            num_experts=own + most,
            w13_weight=_with_more(layer.w13_weight, most),
            w2_weight=_with_more(layer.w2_weight, most),
        )
        return native(enough, x, (weights.masked_fill(elsewhere, 0), places, rest), config)

    module.moe_forward_native = moe_forward_native


def _with_more(experts: Any, count: int) -> Any:
    more = experts.new_zeros(len(experts) + count, *experts.shape[1:])
    more[: len(experts)] = experts
    return more


def _floats(values: Any, scale: Any, block: Any) -> Any:
    """What FP8 values [..., rows, columns] and the scales of their blocks stand for."""
    rows, columns = values.shape[-2:]
    scale = scale.repeat_interleave(block[0], -2)[..., :rows, :]
    return values.float() * scale.repeat_interleave(block[1], -1)[..., :columns]


def _float_product(method: Any, layer: Any, x: Any, bias: Any = None) -> Any:
    from torch.nn.functional import linear

    weight = _floats(layer.weight, layer.weight_scale_inv, method.quant_config.weight_block_size)
    return linear(x, weight.to(x.dtype), bias)


def _keep_runner_config(method: Any, layer: Any, config: Any) -> None:
    method.moe_runner_config = config


def _float_experts(method: Any, layer: Any, dispatch_output: Any) -> Any:
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    x, block = dispatch_output.hidden_states, method.quant_config.weight_block_size
    floats = SimpleNamespace(
        num_experts=layer.num_experts,
        w13_weight=_floats(layer.w13_weight, layer.w13_weight_scale_inv, block).to(x.dtype),
        w2_weight=_floats(layer.w2_weight, layer.w2_weight_scale_inv, block).to(x.dtype),
    )
    return StandardCombineInput(
        hidden_states=moe_forward_native(floats, x, dispatch_output.topk_output, method.moe_runner_config)
    )


CHANGES = {
    "sglang.srt.layers.quantization.fp8": _compute_fp8,
    "sglang.srt.layers.moe.fused_moe_native": _leave_out_other_experts,
}
"""{module: what is changed in it}."""


def install() -> None:
    """Have the finders asked. Twice is once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ChangingFinder())  # type: ignore[arg-type]
        sys.meta_path.append(Finder())  # type: ignore[arg-type]
