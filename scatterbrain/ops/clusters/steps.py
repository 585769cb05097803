"""What the implementations of k-means share."""

# Lloyd's steps look at the first of so many points: centroids are means of many, and half of them find as good ones.
STEP_EVERY = 2
