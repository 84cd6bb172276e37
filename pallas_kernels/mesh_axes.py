"""Names of the axes of a mesh of devices, and what lies along them."""

# Copies of the parameters; parts of parameters and moments; parts of heads, feed-forward layers and the vocabulary;
# parts of rows, along time.
DATA, FSDP, TENSOR, SEQUENCE = MESH_AXES = ("data", "fsdp", "tensor", "sequence")
# The rows of a batch are dealt to the devices along these.
ROWS = (DATA, FSDP)
