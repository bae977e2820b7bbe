"""Run every benchmark and print its table."""

from tests.benchmarks import inference, points, sources, training

if __name__ == "__main__":
    inference.as_workers_run()
    points.main()
    sources.main()
    inference.main()
    training.main()
