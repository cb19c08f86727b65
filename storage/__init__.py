"""What crosses the disk: config, images, folders of captioned images, latent shards, checkpoints.

Nothing is imported here, so that `storage.config` can be had without loading torch:

    storage.atomic      writing, locked: files that are there whole or not at all
    storage.config      load_config, save_config, to_dict, one_line_errors
    storage.images      load_image, image_to_tensor, tensor_to_image, fit, grid, UnusableImage
    storage.captions    caption templates: clean, columns_of, expand
    storage.metadata    read_rows, read_sidecar
    storage.data_config DataConfig
    storage.scan        scan: the one door to folders, shards and datasets
    storage.records     Record, RecordList, Records, Skip, SkipLog, write_skipped, merge_skipped, fingerprint
    storage.rows        gather: rows of any source to records
    storage.folder      pictures and rows of a folder
    storage.verify      look_at, Memory: every picture decoded once, so that no bad one is in the order
    storage.buckets     BucketConfig, Buckets: aspect-ratio buckets
    storage.order       Address, Order, Turns
    storage.dataset     ImageDataset, Sample, Batch, collate, make_loader, draw_caption
    storage.shards      ShardWriter, CachedLatents, CachedSample, CachedBatch, cached_collate
    storage.weights     read_weights, read_folder, outline, write_weights, place, misfits, read_json; for all rooms
    storage.randomness  generator
"""
