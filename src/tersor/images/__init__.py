"""Images: a PNG as matrices in a store, and back."""

from tersor.images.encoded import EncodedImage
from tersor.images.header import LAYOUTS, Header
from tersor.images.image import DEFAULT, compare, decode, encode, is_image, load, pictures, remark
from tersor.images.png import Image, ImageError, from_array, read, to_png

__all__ = ["DEFAULT", "LAYOUTS", "EncodedImage", "Header", "Image", "ImageError", "compare", "decode", "encode",
           "from_array", "is_image", "load", "pictures", "read", "remark", "to_png"]
