"""Progress on a terminal, and one line an epoch where there is none."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from rankprune.recipes.train import Progress


class RichProgress(Progress):
    """Shows a bar on a terminal, and every epoch's figures as a line.

    Args:
        console: where to show it.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.title = ""
        self.bar: Bar | None = None

    def start(self, title: str, total: int, done: int) -> None:
        self.title = title
        if done:
            self.console.print(f"{title}: going on after step {done} of {total}")
        if not self.console.is_terminal:
            return
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            console=self.console,
            transient=True,
        )
        self.bar.start()
        self.bar.add_task(title, total=total, completed=done, loss=0.0)

    def step(self, loss: float, rate: float) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], advance=1, loss=loss)

    def epoch(self, record: dict[str, Any]) -> None:
        ranks = record.get("ranks")
        self.console.print(
            f"{self.title} epoch {record['epoch']:3d}  loss {record['train_loss']:.3f}  "
            f"train {record['train_accuracy']:.2%}  val {record['val_accuracy']:.2%}  "
            f"{record['seconds']:.1f} s"
            + (f"  sum of ranks {sum(ranks.values())}" if ranks else "")
        )

    def note(self, text: str) -> None:
        self.console.print(f"note: {text}", markup=False, soft_wrap=True)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
