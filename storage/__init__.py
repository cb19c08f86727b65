"""What crosses the disk: config, images, folders of captioned images, latent shards, checkpoints.

Nothing is imported here, so that `storage.config` can be had without loading torch:

    storage.config      load_config, save_config, to_dict, one_line_errors
    storage.images      load_image, image_to_tensor, tensor_to_image, fit, grid, UnusableImage
    storage.captions    caption templates: clean, columns_of, expand
    storage.metadata    read_rows, read_sidecar
    storage.folder      DataConfig, Record, Records, Skip, scan, write_skipped, fingerprint
    storage.order       Address, Order
    storage.dataset     ImageDataset, Sample, Batch, collate, make_loader, draw_caption
    storage.shards      ShardWriter, CachedLatents, CachedSample, CachedBatch, cached_collate
    storage.weights     read_weights, read_folder, outline, write_weights, place, misfits, read_json; for all rooms
    storage.randomness  generator
"""
