"""Run both benchmarks, of the host and of the pipeline: ``make bench``."""

from __future__ import annotations

from tests.programs.bench import host, pipeline

if __name__ == "__main__":
    # The pipeline's makes this process large, and a daemon's peak of memory begins with that of the
    # process which starts it (setmax_mm_hiwater_rss in the kernel's exec_mmap).
    host.main()
    pipeline.main()
