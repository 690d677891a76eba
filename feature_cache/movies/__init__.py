"""Movies: what a folder, a file or an array of images means, decided here and nowhere else.

::

    images                      what every reader gives
    image_files, tiff, png      readers of image files
    verdict, ifd, ome, faults   what a TIFF is, by its own tags and words; what is wrong with one
    arrays, zarrs, bioformats   other readers; axes: what their axes mean; chunks: Zarr's files
    times                       the time that a file's name stands for
    formats                     which reader opens a path
    movie                       frames, and the masks that belong to them
    check                       is a movie what it should be?
    tracks                      man_track.txt
"""

from .check import MovieCheck, Problem
from .image_files import read_image
from .images import Images, ReadOptions, Series
from .movie import Given, Movie, Row, Source
from .tracks import Masks, Tracks, link_by_overlap, read_tracks, tracks_of_labels, write_movie

__all__ = [
    "Given",
    "Images",
    "Masks",
    "Movie",
    "MovieCheck",
    "Problem",
    "ReadOptions",
    "Row",
    "Series",
    "Source",
    "Tracks",
    "link_by_overlap",
    "read_image",
    "read_tracks",
    "tracks_of_labels",
    "write_movie",
]
