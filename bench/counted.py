"""What is counted: the same on every machine, however busy it is.

Queue cost and locks are times, but ratios of times of one and the same operation.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from endpoints import End, MemorySink, MemorySource, UsbredirEnd, entries_of
from timed import PER_FLUSH, Implementation
from usbredir.locking import ThreadingLocks
from usbredir.packets import BulkPacket, Packet
from usbredir.parser import Parser, ParserCallbacks
from wire import KINDS, Kind, hello, packet, stream

SMALL = KINDS[0]
LARGE = KINDS[4]
DEPTHS = (64, 256, 1024, 4096, 16384, 65536)
