"""`torchrun ... -m tokenmill.trainer RECIPE.toml --section.key=value` is `tokenmill train`, and with `run` before a
pipeline's file `tokenmill run`.
"""

import sys

from tokenmill.trainer.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(main(arguments if arguments[:1] == ["run"] else ["train", *arguments]))
