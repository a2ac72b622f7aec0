"""Constraints that pin each dependency to the lower bound in pyproject.toml."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for requirement in (*project["dependencies"], *extras["test-core"]):
    print(re.sub(r"\[.*\]", "", requirement).replace(">=", "=="))
