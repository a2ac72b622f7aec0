"""The checkpoint that an optimizer loads, against the ledgers and settings that are here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from ._agreement import check, settle
from ._coverage import Coverage, CoveragePlan
from ._group_state import INITIAL, recall, separated
from ._ledger import TOTALS, Account

__all__ = ["check_load", "object_to", "take_loaded"]


def check_load(
    plan: CoveragePlan, coverage: Coverage, account: Account, saved: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse, before anything is changed, groups that these ledgers cannot go on from."""
    check(account, saved)
    recall(coverage.loops, saved, only_try=True)
    notes = [
        f"group {index} had {group[INITIAL]:g} and has {own:g}"
        for index, (group, own) in enumerate(zip(saved, coverage.own, strict=False))
        if _matters(plan, coverage, index) and float(group.get(INITIAL, own)) != own
    ]
    if notes and plan.on_change != "program":
        object_to(
            plan,
            f"the groups' own decay differs from the checkpoint's: {'; '.join(notes)}",
            "The checkpoint's value counts",
        )


def _matters(plan: CoveragePlan, coverage: Coverage, index: int) -> bool:
    """Return whether a group's own decay acts."""
    own = [t for t in coverage.targets if t.group == index]
    if plan.relative:
        return any(t.schedule is not None for t in own)
    return plan.decoupled and any(t.schedule is None for t in own)


def _keep_own(plan: CoveragePlan, coverage: Coverage, groups: Sequence[dict[str, Any]]) -> None:
    """Put the groups' own decays back where the checkpoint has none, or the program's counts."""
    for group, own in zip(groups, coverage.own, strict=False):
        if plan.on_change == "program" or INITIAL not in group:
            group[INITIAL] = own


def take_loaded(
    plan: CoveragePlan, coverage: Coverage, account: Account, optimizer: Optimizer
) -> None:
    """Take over what the groups know that an optimizer has loaded."""
    groups = optimizer.param_groups
    _keep_own(plan, coverage, groups)
    separated(groups, optimizer.defaults)
    account.alone = account.alone and not any(TOTALS in group for group in groups)
    settle(account, groups)
    recall(coverage.loops, groups)


def object_to(plan: CoveragePlan, change: str, effect: str) -> None:
    """Warn that another program wrote the checkpoint, or raise, as ``on_change`` asks."""
    if plan.on_change == "error":
        raise ValueError(f'{change}. This load is refused because of on_change="error"')
    if plan.on_change == "warn":
        warnings.warn(
            f'{change}. {effect}; on_change="error" refuses such a load, on_change="program" '
            "takes the program's values without a warning",
            stacklevel=3,
        )
