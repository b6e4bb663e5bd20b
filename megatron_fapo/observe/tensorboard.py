"""TensorBoard event files, written by TensorBoard's own writer, which needs no torch."""

import time
from pathlib import Path

from megatron_fapo.observe.interface import StepRecord, files_of

FOLDER = "tensorboard"


class TensorBoardSink:
    """One scalar for each metric. A resumed run tells the reader to forget the steps that are done again."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._folder = folder / FOLDER
        with files_of(self._folder):
            resumed = self._folder.exists()
            self._writer = EventFileWriter(str(self._folder))
            if resumed:
                restart = SessionLog(status=SessionLog.START)
                self._writer.add_event(Event(wall_time=time.time(), step=resume_step, session_log=restart))
                self._writer.flush()

    def write(self, record: StepRecord) -> None:
        """Write the step's scalars."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in record.metrics.items()]
        with files_of(self._folder):
            self._writer.add_event(Event(wall_time=time.time(), step=record.step, summary=Summary(value=values)))
            self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
