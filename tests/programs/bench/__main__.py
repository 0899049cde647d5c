"""``make bench``: what an event costs in the pipeline, and what tscwatch costs its host."""

from __future__ import annotations

from tests.programs.bench import host, pipeline

if __name__ == "__main__":
    pipeline.main()
    host.main()
