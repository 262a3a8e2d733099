"""What every launch says to Triton's compiler."""

# A product and a sum are rounded once where a kernel says tl.math.fma, and twice elsewhere. What a
# compiler would fuse by itself is another thing in another version of Triton, and may be in the
# kernel for rows of another alignment: a row's bits are to depend on neither.
AS_WRITTEN = {"enable_fp_fusion": False}
