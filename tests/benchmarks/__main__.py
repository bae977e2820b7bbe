"""Run every benchmark and print its table."""

from tests.benchmarks import inference, points

if __name__ == "__main__":
    points.main()
    inference.main()
