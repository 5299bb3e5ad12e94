"""Olive's ExtractAdapters on a graph with an adapter in it; run by a Python that has olive-ai.

python olive_extract.py MODEL.onnx OUT_DIRECTORY
"""

import os
import sys

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"

from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.extract_adapters import ExtractAdapters

model, out = sys.argv[1:]
settings = {"save_format": "safetensors", "save_as_external_data": True}
extract = create_pass_from_dict(ExtractAdapters, settings, disable_search=True)
extract.run(ONNXModelHandler(model), out)
