"""The tensor types and file types of GGUF that quantkit writes or names: one table, whatever a library's own says.

No torch: headers are judged with it. A block is a run of `columns` weights of one row, stored in `nbytes` bytes.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GgmlType:
    """number: in a tensor's header; columns of a block; nbytes of a block."""

    number: int
    columns: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.columns

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many columns, a multiple of the block's."""
        assert columns % self.columns == 0
        return columns // self.columns * self.nbytes


GGML_TYPES: dict[str, GgmlType] = {
    "F32": GgmlType(0, 1, 4),
    "F16": GgmlType(1, 1, 2),
    "Q4_0": GgmlType(2, 32, 18),
    "Q4_1": GgmlType(3, 32, 20),
    "Q5_0": GgmlType(6, 32, 22),
    "Q5_1": GgmlType(7, 32, 24),
    "Q8_0": GgmlType(8, 32, 34),
    "Q8_1": GgmlType(9, 32, 36),
    "Q2_K": GgmlType(10, 256, 84),
    "Q3_K": GgmlType(11, 256, 110),
    "Q4_K": GgmlType(12, 256, 144),
    "Q5_K": GgmlType(13, 256, 176),
    "Q6_K": GgmlType(14, 256, 210),
    "Q8_K": GgmlType(15, 256, 292),
    "IQ2_XXS": GgmlType(16, 256, 66),
    "IQ2_XS": GgmlType(17, 256, 74),
    "IQ3_XXS": GgmlType(18, 256, 98),
    "IQ1_S": GgmlType(19, 256, 50),
    "IQ4_NL": GgmlType(20, 32, 18),
    "IQ3_S": GgmlType(21, 256, 110),
    "IQ2_S": GgmlType(22, 256, 82),
    "IQ4_XS": GgmlType(23, 256, 136),
    "I8": GgmlType(24, 1, 1),
    "I16": GgmlType(25, 1, 2),
    "I32": GgmlType(26, 1, 4),
    "I64": GgmlType(27, 1, 8),
    "F64": GgmlType(28, 1, 8),
    "IQ1_M": GgmlType(29, 256, 56),
    "BF16": GgmlType(30, 1, 2),
    "TQ1_0": GgmlType(34, 256, 54),
    "TQ2_0": GgmlType(35, 256, 66),
    "MXFP4": GgmlType(39, 32, 17),
    "NVFP4": GgmlType(40, 64, 36),
    "Q1_0": GgmlType(41, 128, 18),
    "Q2_0": GgmlType(42, 64, 18),
}
TYPE_NAMES = {type_.number: name for name, type_ in GGML_TYPES.items()}

# What quantkit can choose codes for; F16, BF16 and F32 are written too, MXFP4 and NVFP4 only carried over.
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")

STORED = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16"}  # type of a dense tensor by safetensors' dtype
SHORT_MIXES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama-quantize's own short names

FILE_TYPES: dict[str, int] = {  # general.file_type by the name of the mix
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
    "MXFP4_MOE": 38,
    "NVFP4": 39,
}
