"""The drive that a model lies on, measured where a plan may read weights from it when they are needed.

Knows nothing about what is read.
"""

from pathlib import Path

from offload.errors import FlashError
from offload.flash_probe import STREAMING_POINTS
from planner.hit_curve import traced_curve
from planner.machine_here import flash_here
from planner.model_shape import ModelShape
from planner.plan import PlannedModel, Settings
from planner.profile import Profile, with_drive
from planner.streamed import Streaming, all_slots, hit_curve


def drive_known(profile: Profile, model: PlannedModel) -> Profile:
    """`profile` with the drive that a model lies on; FlashError where it cannot be measured."""
    try:
        return with_drive(profile, Path(model.path), points=STREAMING_POINTS)
    except OSError as error:
        raise FlashError(f"the drive of {model.path} cannot be measured: {error}") from error


def streaming_here(shape: ModelShape, profile: Profile, model: PlannedModel, settings: Settings) -> Streaming | None:
    """Where experts come from and how often, if they are streamed; the drive is measured where it is not known."""
    if not settings.stream_slots:
        return None
    flash = flash_here(drive_known(profile, model), Path(model.path))
    assert flash is not None, "the drive was measured"
    points = profile.hits.get(model.key)
    return Streaming(flash, hit_curve(shape, None if points is None else traced_curve(points, all_slots(shape))))
