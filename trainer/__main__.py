"""`torchrun ... -m tokenmill.trainer RECIPE.toml --section.key=value` is `tokenmill train`."""

import sys

from tokenmill.trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
