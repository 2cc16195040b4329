"""llama.cpp's own server on a port of loopback, until it is ended: `PORT write`, `PORT exact` or `PORT embed`."""

import signal
import sys

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = "tiny.gguf"
parameters.n_ctx = 8192
parameters.kv_unified = True
parameters.n_parallel = 4
parameters.cpuparams.n_threads = 1
parameters.hostnames = ["127.0.0.1"]
parameters.port = int(sys.argv[1])
parameters.endpoint_metrics = True
parameters.warmup = False
if sys.argv[2] == "exact":  # else a text that is read at once is rounded otherwise than one that is written
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.sampling.temp, parameters.sampling.top_k = 1.0, 0  # any token, as with other engines
parameters.sampling.top_p, parameters.sampling.min_p = 1.0, 0.0
if sys.argv[2] == "embed":
    parameters.embedding = True
    parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(parameters)
signal.pause()
