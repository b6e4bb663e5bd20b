"""One process, one rank of the policy: plain methods with picklable arguments.

It runs as a Ray actor, under torchrun, or in a spawned process (`policy.local`); it knows none of them. Methods
marked *collective* wait for all ranks: call them on every rank with the same arguments.
"""

import dataclasses
import gc
import math
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_fapo.compat.device import Device, current  # before torch and megatron

import torch.distributed as dist  # isort: skip
from megatron.core import parallel_state

from megatron_fapo.algorithm.losses import TokenLosses, denominator, policy_loss, supervised_loss
from megatron_fapo.algorithm.settings import LossSettings
from megatron_fapo.batch.layout import Layout
from megatron_fapo.errors import Diverged, PolicyError
from megatron_fapo.held import HeldLayout
from megatron_fapo.policy import export, forward, passes
from megatron_fapo.policy.checkpoint import Checkpoints
from megatron_fapo.policy.forward import Padded, Scores
from megatron_fapo.policy.model import Model, build, connect, crossover_of, release
from megatron_fapo.policy.objective import loss_tokens
from megatron_fapo.policy.offload import Freed, Offload
from megatron_fapo.policy.reference import Reference
from megatron_fapo.policy.schedule import learning_rate
from megatron_fapo.policy.sender import Sender
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.records import (
    Bucket,
    Floats,
    MicroBatch,
    MiniBatch,
    StepBatch,
    StepReport,
    UpdateReport,
)
from megatron_fapo.trace import KINDS, Kind


class PolicyRank:
    """A rank of the policy. First `setup`, then any other method, in the same order on all ranks."""

    def __init__(self) -> None:
        self.device: Device = current()
        self._settings: PolicySettings | None = None
        self._model: Model | None = None
        self._reference: Reference | None = None
        self._layout = Layout()
        self._updates = 0
        self._export: export.Export | None = None
        self._sender: Sender | None = None
        self._offload: Offload | None = None
        self._checkpoints: Checkpoints | None = None

    def address(self, host: str = "127.0.0.1") -> tuple[str, int]:
        """An address at which rank 0 can be met: `host` and a port that is free at this moment."""
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, int(probe.getsockname()[1])

    def setup(self, rank: int, world: int, address: str, port: int, settings: PolicySettings, seed: int) -> Layout:
        """Meet the other ranks, build this rank's part of the model and load the weights. Collective.

        Raises ConfigError for a model or layout that cannot be built, DataError for a folder whose weights do not
        fit, PolicyError when the ranks do not meet.
        """
        if world != settings.parallel.world:
            raise PolicyError(f"{world} ranks were started for a layout of {settings.parallel.world}", rank=rank)
        self.device.install()
        self.device.claim(rank)
        try:
            self._layout = connect(rank, address, port, settings, self.device, seed)
        except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
            raise PolicyError(f"the ranks did not meet at {address}:{port}: {error}", rank=rank) from error
        with self.device.active():
            self._model = build(settings, self.device)
            self._reference = Reference(self._model) if settings.reference else None
        self._layout = dataclasses.replace(self._layout, crossover=crossover_of(self._model))
        self._offload = Offload(self._model, self.device)
        self._settings, self._updates, self._export = settings, 0, None
        self._checkpoints = Checkpoints(self._model, self._layout, self.device)
        return self._layout

    def shutdown(self) -> None:
        """Leave the process groups and give back all memory and threads; a save that runs is abandoned."""
        if self._checkpoints is not None:
            self._checkpoints.abandon()
        self._end_export()
        if self._model is not None:
            release(self._model)
        self._model = self._reference = self._offload = self._checkpoints = None
        self._sender = None
        gc.collect()
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    # --- training -------------------------------------------------------------------------------------------

    def update(self, batch: StepBatch, loss: LossSettings) -> StepReport:
        """All optimizer steps of one step; each rank takes its own column of the microbatches. Collective.

        Behaviour log-probs are those of the batch, or Megatron's own before the first update where
        `PolicySettings.rescore` says so. A sequence is stale when it has tokens of weights other than version
        `batch.step`. Every rank returns the same report. Raises Diverged on all ranks.
        """
        started = time.perf_counter()
        columns = [self._column(minibatch) for minibatch in batch.minibatches]
        rescored = self._must_rescore(batch)
        gap = gap_max = 0.0
        if rescored:
            columns, gap, gap_max = self._rescore(columns)
        if loss.kl is not None:
            columns = self._with_reference(columns)
        reports = []

        def loss_function(scores: Scores, padded: Padded) -> TokenLosses:
            return policy_loss(loss_tokens(scores, padded), loss)

        for number, (minibatch, column) in enumerate(zip(batch.minibatches, columns, strict=True)):
            divisor = denominator(
                loss, num_loss_tokens=minibatch.num_loss_tokens, num_sequences=minibatch.num_sequences
            )
            report, totals = self._optimize(column, loss_function, minibatch, divisor, batch.step)
            reports.append(report)
            if number == 0 and not rescored:
                gap, gap_max = totals.mismatch / max(totals.chosen, 1), totals.mismatch_max
        return StepReport(
            step=batch.step,
            updates=tuple(reports),
            mismatch_mean=gap,
            mismatch_max=gap_max,
            rescored=rescored,
            seconds=time.perf_counter() - started,
        )

    def supervised_update(self, minibatch: MiniBatch) -> UpdateReport:
        """One optimizer step on the negative log-likelihood of the loss tokens. Collective. Raises Diverged."""

        def loss_function(scores: Scores, padded: Padded) -> TokenLosses:
            return supervised_loss(scores.logprobs)

        return self._optimize(self._column(minibatch), loss_function, minibatch, minibatch.num_loss_tokens, None)[0]

    def score(self, microbatches: Sequence[Sequence[MicroBatch]]) -> tuple[Floats, ...]:
        """Log-probs of every token at the microbatch's temperature, under the current weights. Collective.

        Takes `microbatches[m][dp]`; returns, for each m, the packed log-probs [T] of this rank's own microbatch,
        with 0.0 at the first token of each sequence.
        """
        own = [row[parallel_state.get_data_parallel_rank()] for row in microbatches]
        padded = [self._pad(batch, every_token=True) for batch in own]
        with self.device.active():
            values = passes.logprobs(self.model, padded)
            return tuple(
                passes.whole(forward.unpad(row, part, len(batch.token_ids)))
                for row, part, batch in zip(values, padded, own, strict=True)
            )

    @property
    def model(self) -> Model:
        """What `setup` built."""
        if self._model is None:
            raise PolicyError("setup() comes first")
        self._away.need("parameters")
        return self._model

    @property
    def checkpoints(self) -> Checkpoints:
        """Saves and loads what `setup` built."""
        if self._checkpoints is None:
            raise PolicyError("setup() comes first")
        return self._checkpoints

    @property
    def settings(self) -> PolicySettings:
        """What `setup` was given."""
        if self._settings is None:
            raise PolicyError("setup() comes first")
        return self._settings

    def _column(self, minibatch: MiniBatch) -> list[Padded]:
        """This data-parallel rank's microbatches, laid out in rows."""
        mine = parallel_state.get_data_parallel_rank()
        return [self._pad(row[mine]) for row in minibatch.microbatches]

    def _pad(self, batch: MicroBatch, every_token: bool = False) -> Padded:
        """This context-parallel rank's part of a microbatch, in rows."""
        rank = parallel_state.get_context_parallel_rank()
        return forward.pad(batch, self.device.torch_device(), every_token, self._layout, rank)

    def _must_rescore(self, batch: StepBatch) -> bool:
        if self.settings.rescore != "when_stale":
            return self.settings.rescore == "always"
        every = (micro for mini in batch.minibatches for row in mini.microbatches for micro in row)
        return any((micro.versions != batch.step).any() for micro in every)

    def _rescore(self, columns: list[list[Padded]]) -> tuple[list[list[Padded]], float, float]:
        """Put Megatron's own log-probs in the place of the sampled ones; also the mean and largest gap."""
        flat = [padded for column in columns for padded in column]
        with self.device.active():
            values = passes.logprobs(self.model, flat)
            gap, gap_max = passes.mismatch(values, flat)
        again = iter(values)
        fresh = [
            [dataclasses.replace(padded, behaviour=next(again), sampled=padded.behaviour) for padded in column]
            for column in columns
        ]
        return fresh, gap, gap_max

    def _with_reference(self, columns: list[list[Padded]]) -> list[list[Padded]]:
        """Log-probs under the reference policy beside the others."""
        if self._reference is None:
            raise PolicyError("a KL penalty (algorithm.loss.kl) needs policy.reference=true", rank=dist.get_rank())
        with self.device.active(), self._reference.in_place(self.model):
            values = iter(passes.logprobs(self.model, [padded for column in columns for padded in column]))
        return [[dataclasses.replace(padded, reference=next(values)) for padded in column] for column in columns]

    def _optimize(
        self,
        column: list[Padded],
        loss_function: passes.LossFunction,
        minibatch: MiniBatch,
        divisor: int,
        step: int | None,
    ) -> tuple[UpdateReport, passes.Totals]:
        """One optimizer step on the sum of the losses by `divisor`."""
        self._away.need(*KINDS)
        model, optimizer, num_loss_tokens = self.model, self.model.optimizer, minibatch.num_loss_tokens
        rate = learning_rate(self._updates, self.settings.optimizer)
        where = {"rank": dist.get_rank(), "update": self._updates} | ({} if step is None else {"step": step})
        for group in optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = self.settings.optimizer.weight_decay * group.get("wd_mult", 1.0)
        with self.device.active():
            for chunk in model.parallel:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            totals = passes.forward_backward(model, column, loss_function, divisor)
            if not math.isfinite(totals.loss):
                raise Diverged(f"the loss is {totals.loss}; continue from a checkpoint with a lower rate", **where)
            _, norm, _ = optimizer.step()
        if not math.isfinite(norm):
            raise Diverged(f"the gradient norm is {norm}; continue from a checkpoint with a lower rate", **where)
        self._updates += 1
        report = UpdateReport(
            loss=totals.loss / divisor,
            grad_norm=float(norm),
            learning_rate=rate,
            clipped_share=totals.clipped / num_loss_tokens,
            kl_behaviour=totals.kl / max(totals.chosen, 1),
            entropy=totals.entropy / max(totals.chosen, 1) if self.settings.entropy else None,
            kl_reference=totals.reference_kl / max(totals.chosen, 1),
            truncated_share=totals.truncated / max(totals.chosen, 1),
            loss_tokens=num_loss_tokens,
            tokens=totals.tokens,
            padded_tokens=totals.positions,
            imbalance=minibatch.imbalance,
        )
        return report, totals

    # --- weights --------------------------------------------------------------------------------------------

    def open_export(self, layouts: Sequence[HeldLayout] = ()) -> None:
        """Start an export of the current weights, to servers that hold them in these layouts. Collective."""
        with self.device.active():
            if self._export is None:
                self._export = export.Export(self.model, self.settings.timeout)
            self._export.restart(layouts)

    def next_bucket(self, segment_path: str, nbytes: int) -> Bucket | None:
        """Fill shared memory of `nbytes` at `segment_path` with the next tensors, under Hugging Face names.

        A path that begins with `cuda-ipc:` names memory of rank 0's device, and the bucket says how to open it.
        Collective; rank 0 writes and returns the bucket. None on the other ranks, and on rank 0 after the last one.
        Raises PolicyError when a tensor is larger than `nbytes`, or without `open_export`.
        """
        if self._export is None:
            raise PolicyError("open_export() comes first")
        with self.device.active():
            return self._export.next_bucket(Path(segment_path), nbytes)

    def expected(self, layout: HeldLayout) -> dict[str, str] | None:
        """After the last bucket, on rank 0: {parameter: digest} that a server of this layout must hold now.

        The layout is one of those given to `open_export`. Raises WeightsError for a model that the layout cannot
        place.
        """
        if self._export is None:
            raise PolicyError("open_export() comes first")
        return self._export.expected(layout)

    def _end_export(self) -> None:
        if self._export is not None:
            self._export.close()
        self._export = None

    def open_group(self, name: str, host: str, backend: str, seconds: float) -> tuple[str, int]:
        """On rank 0: prepare a group of this rank and servers; the address at which they meet, `host` and a port."""
        self._sender = Sender(name, host, backend, seconds)
        return host, self._sender.port

    def join_group(self, world: int) -> str:
        """On rank 0: wait until all `world` members have met. Why they did not, else ""; the ranks are well then."""
        return self._opened().join(world)

    def send_bucket(self, bucket: Bucket) -> str:
        """On rank 0: broadcast a bucket of `next_bucket` to the group. Why that failed, else ""."""
        return self._opened().send(bucket)

    def close_group(self) -> None:
        """On rank 0: leave the group."""
        self._sender = None

    def _opened(self) -> Sender:
        if self._sender is None:
            raise PolicyError("open_group() comes first")
        return self._sender

    def save_hf(self, folder: str) -> None:
        """Write a Hugging Face folder: weights, config, tokenizer. Collective; rank 0 writes."""
        with self.device.active():
            export.save_hf(self.model, self.settings.model, Path(folder))

    # --- memory ----------------------------------------------------------------------------------------------

    def offload(self, kinds: Sequence[Kind] = KINDS) -> Freed:
        """Free the device's memory of these kinds until `onload`; bytes freed of each.

        An export that is open ends. A verb that needs what is away raises PolicyError.
        """
        self._end_export()
        return self._away.out(kinds)

    def onload(self, kinds: Sequence[Kind] = KINDS) -> Freed:
        """Put back what `offload` freed, to the last bit (gradients as zeros); bytes of each."""
        return self._away.back(kinds)

    def resident(self) -> Freed:
        """Bytes of each kind in the device's memory now."""
        return self._away.resident()

    def device_free(self) -> int | None:
        """Free bytes of this rank's device, whoever uses the rest; None where it shares the host's memory."""
        return self.device.memory.free()

    @property
    def _away(self) -> Offload:
        if self._offload is None:
            raise PolicyError("setup() comes first")
        return self._offload

    # --- checkpoints ----------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """Write weights, optimizer, schedule position and random states into `folder`. Collective."""
        self.begin_save(folder)
        self.end_save()

    def begin_save(self, folder: str) -> None:
        """Copy what `save` writes and write it in the background; any verb may follow. Collective."""
        self._away.need("parameters", "optimizer")
        with self.device.active():
            self.checkpoints.begin(Path(folder), self._updates)

    def save_written(self) -> bool:
        """Whether this rank has nothing left to write, so that `end_save` will not keep it waiting."""
        return self.checkpoints.written()

    def end_save(self) -> None:
        """Complete the checkpoint, once all ranks have written. Collective. Raises PolicyError on all ranks."""
        with self.device.active():
            self.checkpoints.end()

    def load(self, folder: str) -> None:
        """Continue exactly where `save` was called. Collective.

        Raises CheckpointDamaged naming the file when the folder is missing, incomplete or damaged, ResumeError
        when it is of another model.
        """
        self._away.need("parameters", "optimizer")
        with self.device.active():
            self._updates = self.checkpoints.load(Path(folder))
