"""Files of tests are not flushed to disk: tests kill processes, but none cuts the power. Flushing took a seventh of the
time."""

import os

os.fsync = lambda descriptor: None
