"""Running the same calls on a local file system and on the mount, and comparing what they say."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def told(call: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """What a call returns, or the name of its errno."""
    try:
        return call(*args, **more)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def run_machine(machine: type[RuleBasedStateMachine], examples: int) -> None:
    """Random sequences of calls; to shrink a failure takes longer than a test may."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
            phases=(Phase.explicit, Phase.reuse, Phase.generate),
            suppress_health_check=list(HealthCheck),
        ),
    )


def report(differences: Iterable[str]) -> None:
    """Fail with all that was different, one line each."""
    lines = list(differences)
    assert not lines, f"{len(lines)} differences\n" + "\n".join(lines[:60])


@dataclass
class Both:
    """Two directories: one of a local file system, one of the mount."""

    local: Path
    mounted: Path
    _number: int = 0

    def same(self, steps: Callable[[Path], Any]) -> Any:
        """Run `steps` in a new directory on either side; both must tell the same. Returns what they told."""
        self._number += 1
        expected, found = (self._run(top, steps) for top in (self.local, self.mounted))
        if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
            report(
                f"step {number}: local {one!r:.300}, mount {other!r:.300}"
                for number, (one, other) in enumerate(zip(expected, found, strict=True))
                if one != other
            )
        assert found == expected, f"local {expected!r:.2000}\nmount {found!r:.2000}"
        return found

    def _run(self, top: Path, steps: Callable[[Path], Any]) -> Any:
        path = top / f"steps{self._number}"
        path.mkdir()
        return steps(path)
