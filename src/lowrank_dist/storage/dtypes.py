"""The dtypes that are read and written, by their codes in safetensors headers and by their names in options."""

from __future__ import annotations

import torch

#: Dtypes that are read, copied and written, by their codes in safetensors headers.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: Codes in safetensors headers, by dtype.
CODES = {dtype: code for code, dtype in DTYPES.items()}
#: Dtypes of weights that are decomposed, merged or adapted, by code.
FLOAT_DTYPES = {code: DTYPES[code] for code in ("F32", "F16", "BF16")}
#: The same dtypes by their names in options: ``float32``, ...
NAMED_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES.values()}
#: By Lightning's names of precisions: dtype of frozen parameters and of arithmetic, dtype of trained parameters.
PRECISIONS = {
    "32-true": (torch.float32, torch.float32),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "bf16-mixed": (torch.bfloat16, torch.float32),
}
