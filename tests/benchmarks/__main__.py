"""Run every benchmark and print its table."""

from tests.benchmarks import inference

if __name__ == "__main__":
    inference.main()
