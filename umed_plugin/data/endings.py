"""The endings of image files that are read, in lower case. A DICOM file may have none."""

from __future__ import annotations

RASTER_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
NIFTI_ENDINGS = (".nii", ".nii.gz")
IMAGE_ENDINGS = RASTER_ENDINGS + DICOM_ENDINGS + NIFTI_ENDINGS
