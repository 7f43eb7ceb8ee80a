#include "codec.h"
#define W __attribute__((weak))
W uint64_t am_lossless_size(uint32_t c, am_block b){(void)c;return am_block_bytes(b)-1;}
W uint64_t am_lossless_encode(uint32_t c, am_block b,const void*k,const void*v,uint8_t*o){(void)c;(void)b;(void)k;(void)v;(void)o;return 0;}
W int am_lossless_decode(uint32_t c, am_block b,const uint8_t*i,uint64_t s,void*k,void*v){(void)c;(void)b;(void)k;(void)v;(void)i;(void)s;return -1;}
W uint64_t am_quantized_size(uint32_t c, am_block b){(void)c;return am_block_bytes(b)-1;}
W uint64_t am_quantized_encode(uint32_t c, am_block b,const void*k,const void*v,uint8_t*o){(void)c;(void)b;(void)k;(void)v;(void)o;return 0;}
W int am_quantized_decode(uint32_t c, am_block b,const uint8_t*i,uint64_t s,void*k,void*v){(void)c;(void)b;(void)k;(void)v;(void)i;(void)s;return -1;}
