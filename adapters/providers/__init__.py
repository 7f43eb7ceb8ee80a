"""One file per scheme of a model string; files with an underscore are shared or parts of one."""
