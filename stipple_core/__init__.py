"""What crosses the disk: config, images, folders of captioned images, latent shards, checkpoints.

Nothing is imported here, so that `stipple_core.config` can be had without loading torch:

    stipple_core.files.atomic      writing, locked: files that are there whole or not at all
    stipple_core.config      load_config, save_config, to_dict, one_line_errors
    stipple_core.images.images      load_image, image_to_tensor, tensor_to_image, fit, grid, UnusableImage
    stipple_core.data.records.captions    caption templates: clean, columns_of, expand
    stipple_core.data.sources.metadata    read_rows, read_sidecar
    stipple_core.data.records.data_config DataConfig
    stipple_core.data.sources.scan        scan: the one door to folders, shards and datasets
    stipple_core.data.records.records     Record, RecordList, Records, Skip, SkipLog, write_skipped, merge_skipped, fingerprint
    stipple_core.data.records.rows        gather: rows of any source to records
    stipple_core.data.sources.folder      pictures and rows of a folder
    stipple_core.data.verify      look_at, Memory: every picture decoded once, so that no bad one is in the order
    stipple_core.data.records.buckets     BucketConfig, Buckets: aspect-ratio buckets
    stipple_core.data.order       Address, Order, Turns
    stipple_core.data.dataset     ImageDataset, Sample, Batch, collate, make_loader, draw_caption
    stipple_core.latent_cache.reader      LatentCacheWriter, CachedLatents, CachedSample, CachedBatch, cached_collate
    stipple_core.files.weights     read_weights, read_folder, outline, write_weights, place, misfits, read_json; for all rooms
    stipple_core.randomness  generator
"""
