"""Run both benchmarks, of the host and of the pipeline: ``make bench``."""

from __future__ import annotations

from tests.programs.bench import host, pipeline

if __name__ == "__main__":
    # The pipeline's benchmark makes this process large, and the kernel counts that as memory of the
    # daemons that the host's starts (setmax_mm_hiwater_rss in exec_mmap).
    host.main()
    pipeline.main()
