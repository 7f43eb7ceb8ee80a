"""Builds the optional C extension ``agentmem._native`` with the stable ABI; all else is in pyproject.toml.

The extension is ``optional``: without a C compiler the package installs all the same and runs on ``agentmem/_pure.py``.
Free-threaded builds have no stable ABI, so there the extension is built for that very version.
"""

import os
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
sources = sorted(str(path) for path in Path("native").glob("*.c"))

setup(
    ext_modules=[
        Extension(
            "agentmem._native",
            sources=sources,
            depends=sorted(str(path) for path in Path("native").glob("*.h")),
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if limited else [],
            libraries=[] if os.name == "nt" else ["m"],
            # No contraction to fused multiply-adds: every instruction set has to give the same bits.
            extra_compile_args=["-O3", "-fvisibility=hidden", "-ffp-contract=off"],
            py_limited_api=limited,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if limited else {},
)
