"""Pack fundus photographs and their grades into a .beton file; the same as `fastretina pack`."""

from fastretina.pack import run_command

if __name__ == "__main__":
    run_command()
