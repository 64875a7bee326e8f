"""Let the suite run from a bare checkout too; an installed hdrq-deploy is used as it is."""

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent

if importlib.util.find_spec("hdrq_deploy") is None:
    sys.path.insert(0, str(_ROOT))
if importlib.util.find_spec("hdrq_deploy.exporters") is None:
    import hdrq_deploy

    # exporters/, runtime/ and calibration_data/ sit beside the package.
    hdrq_deploy.__path__.append(str(_ROOT))
