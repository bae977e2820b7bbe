"""Run every benchmark and print its table."""

from tests.benchmarks import inference, points, training

if __name__ == "__main__":
    points.main()
    inference.main()
    training.main()
