"""Bad input: each message says what was found, where, and what to do."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from cellplm_scvi import CellPLM
from cellplm_scvi.data._checks import check_counts

from conftest_import import TINY
