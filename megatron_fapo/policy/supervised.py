"""Supervised training as a loop over batches: the warm-up of a policy, or the training of a judge."""

from collections.abc import Callable, Iterable

from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.records import MiniBatch, UpdateReport


def train_supervised(
    ranks: LocalRanks,
    batches: Iterable[MiniBatch],
    on_update: Callable[[int, UpdateReport], None] | None = None,
) -> UpdateReport | None:
    """One optimizer step a batch; returns the last report, None without batches.

    Consumes: `batches`, the next one while the ranks work on the current one. Waits for: all ranks' reports.
    `on_update` gets the number of the update, from 0, and its report. Raises Diverged, PolicyError.
    """
    number, last = -1, None
    for batch in batches:
        if number >= 0:
            last = _report(ranks, number, on_update)
        ranks.start("supervised_update", batch)
        number += 1
    return _report(ranks, number, on_update) if number >= 0 else last


def _report(ranks: LocalRanks, number: int, on_update: Callable[[int, UpdateReport], None] | None) -> UpdateReport:
    report: UpdateReport = ranks.finish()[0]
    if on_update is not None:
        on_update(number, report)
    return report
