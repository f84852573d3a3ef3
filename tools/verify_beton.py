"""Check every sample of a .beton file; the same as `fastretina verify`."""

from fastretina.verify import run_command

if __name__ == "__main__":
    run_command()
