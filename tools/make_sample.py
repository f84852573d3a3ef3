"""Make a sample data set in the lab layout out of one real photograph; the same as `python -m fastretina.sample`."""

from fastretina.sample.__main__ import run_command

if __name__ == "__main__":
    run_command()
