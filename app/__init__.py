"""The viewer: ``python -m app.viewer [ROOT]`` shows run and result folders in a browser.

``catalog`` finds and reads the folders; it has no widgets. Each tab has one or more modules.
"""
