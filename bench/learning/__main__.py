"""`python -m redi.bench.learning`; its workers import what they run, which this file cannot be."""

from redi.bench.learning.study import main

if __name__ == "__main__":
    main()
