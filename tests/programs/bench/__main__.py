"""Run both benchmarks, of the pipeline and of the host: ``make bench``."""

from __future__ import annotations

from tests.programs.bench import host, pipeline

if __name__ == "__main__":
    pipeline.main()
    host.main()
