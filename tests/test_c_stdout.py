"""Standard output is for what was asked for, whatever a library prints there."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no C library by that name")


def _run(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, check=True
    )


def test_what_c_prints_goes_to_stderr() -> None:
    """Into a pipe, where C keeps its text until the process ends."""
    done = _run(
        """
        import ctypes
        from rankprune.c_stdout import c_stdout_to_stderr

        libc = ctypes.CDLL(None)
        libc.puts(b"before")
        try:
            with c_stdout_to_stderr():
                libc.puts(b"noise")
                raise ValueError
        except ValueError:
            libc.puts(b"after")
        print("python")
        """
    )
    assert sorted(done.stdout.split()) == ["after", "before", "python"]
    assert done.stderr == "noise\n"


def test_without_standard_output() -> None:
    done = _run(
        """
        import os
        from rankprune.c_stdout import c_stdout_to_stderr

        os.close(1)
        with c_stdout_to_stderr():
            os.write(2, b"went on")
        """
    )
    assert done.stderr == "went on"


def test_in_two_threads_at_a_time() -> None:
    """The second one in finds the output redirected, and leaves last."""
    done = _run(
        """
        import os
        from rankprune.c_stdout import c_stdout_to_stderr

        first, second = c_stdout_to_stderr(), c_stdout_to_stderr()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        os.write(1, b"noise")
        second.__exit__(None, None, None)
        os.write(1, b"back")
        """
    )
    assert (done.stdout, done.stderr) == ("back", "noise")


def test_budgets_are_solved_so() -> None:
    """The solver itself prints too rarely to wait for."""
    done = _run(
        """
        import ctypes
        from rankprune import knapsack
        from rankprune.knapsack import Choice

        solver = knapsack.milp

        def noisy(*args, **kwargs):
            ctypes.CDLL(None).puts(b"noise")
            return solver(*args, **kwargs)

        knapsack.milp = noisy
        losses = [0.0, 1.0, 2.0, 3.0, 4.0]
        groups = [[Choice(loss, (10 - loss + i / 7,)) for loss in losses] for i in range(5)]
        print(knapsack.solve(groups, [33.3]) is not None)
        """
    )
    assert done.stdout == "True\n"
    assert "noise" in done.stderr
