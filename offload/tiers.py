"""Where bytes lie and what computes: the two words every placement is made of.

Knows nothing about models or plans. The values are the ones written to plan documents.
"""

from enum import StrEnum


class Tier(StrEnum):
    """Memory that holds a unit, fastest first."""

    GPU = "gpu"
    RAM = "ram"
    FLASH = "flash"


class Device(StrEnum):
    """Processor that computes a unit."""

    CPU = "cpu"
    GPU = "gpu"
