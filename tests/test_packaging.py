"""The house: who may import whom, that `kernels` stays HuggingFace's, and what files hold."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lvspec import environment

ROOT = Path(__file__).resolve().parents[1]

# Imports point down this list: a package (or one of the few files beside them) imports from a floor
# below its own, where `kernels` has none: lvspec.ops alone imports it, and it imports `rule` alone,
# the names of a policy's numbers. What is not named here has no place in lvspec/.
FLOORS = [
    {"checkpoint", "checks", "environment", "rule", "tree", "warmup"},
    {"profile"},
    {"policy", "tree_shapes", "video"},
    {"config", "reference"},
    {"ops"},
    {"models"},
    {"phases"},
    {"engine"},
    {"evaluation"},
    {"calibration"},
    {"reporting"},
