"""What a run says: a progress bar, metrics.jsonl, TensorBoard, pictures. Only process 0 speaks."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Value = float | np.ndarray  # a number, or a uint8 picture [H, W, C]


class Clock:
    """Examples a second and the share of time spent waiting for data, between two readings."""

    def __init__(self):
        self.read(0)

    def read(self, steps: int) -> tuple[float, float]:
        """(steps a second, share of time waited) since the last reading, which starts anew."""
        now = time.perf_counter()
        elapsed = max(now - getattr(self, "start", now), 1e-9)
        rates = steps / elapsed, getattr(self, "waited", 0.0) / elapsed
        self.start, self.waited = now, 0.0
        return rates

    def wait(self, iterator):
        """The iterator's next element; the time it takes counts as waiting."""
        begin = time.perf_counter()
        try:
            return next(iterator)
        finally:
            self.waited += time.perf_counter() - begin


class Log:
    """The diary of a run directory; `write(step, values)` is all that training needs of it."""

    def __init__(self, run: Path, steps: int, start: int = 0):
        from tensorboardX import SummaryWriter

        self.speaks = jax.process_index() == 0
        self.run, self.steps = run, steps
        self.console = Console(stderr=True, quiet=not self.speaks)
        self.handler = RichHandler(console=self.console, show_path=False, show_time=False)
        logging.getLogger("sslx").addHandler(self.handler)
        columns = [TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(None)]
        columns += [TextColumn("{task.fields[said]}"), TimeRemainingColumn(compact=True)]
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("train", total=steps, completed=start, said="compiling")
        self.bar.start()
        if self.speaks:
            self.truncate(start)
            self.file = (run / "metrics.jsonl").open("a")
            self.board = SummaryWriter(str(run), purge_step=start + 1 if start else None)

    def truncate(self, start: int) -> None:
        """Forget what was written after the checkpoint that a run resumes from."""
        path = self.run / "metrics.jsonl"
        rows = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [row for row in rows if row.endswith("}\n")]  # a kill may cut the last line
        path.write_text("".join(r for r in whole if json.loads(r)["step"] <= start))

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Numbers to metrics.jsonl and TensorBoard, pictures to pictures/ and TensorBoard."""
        if not self.speaks:
            return
        numbers = {k: float(v) for k, v in values.items() if not isinstance(v, np.ndarray)}
        row = {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)
        for name in values.keys() - numbers.keys():
            self.board.add_image(name, values[name], step, dataformats="HWC")
            self.picture(f"{name}-{step:06d}", values[name])

    def picture(self, name: str, image: np.ndarray) -> None:
        from PIL import Image

        path = self.run / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(path)

    def progress(self, step: int, said: str = "", line: bool = False) -> None:
        """Move the bar; with `line`, a line of its own where there is no terminal for a bar."""
        self.bar.update(self.task, completed=step, **({"said": said} if said else {}))
        if line and said and not self.console.is_terminal:
            self.console.print(f"step {step}/{self.steps}  {said}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        logging.getLogger("sslx").removeHandler(self.handler)
        self.bar.stop()
        if self.speaks:
            self.file.close()
            self.board.close()
