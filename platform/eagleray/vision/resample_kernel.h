/* The inner loops of resample.c, compiled once for each instruction set; NAME gives each copy its name. */

/* Four rows, pixel by pixel beside one another (4 bytes a pixel): what one sum then reads at a time is 4 x RGBX. */
static void NAME(interleave)(const uint8_t *in, size_t stride, int channels, int rows, int32_t columns, uint8_t *out) {
    for (int row = 0; row < rows; row++) {
        const uint8_t *from = in + row * stride;
        uint8_t *to = out + 4 * row;
        if (channels == 1) {
            for (int32_t at = 0; at < columns; at++) to[16 * at] = to[16 * at + 1] = to[16 * at + 2] = from[at];
        } else {
            for (int32_t at = 0; at < columns - 1; at++) memcpy(to + 16 * at, from + (size_t)at * channels, 4);
            memcpy(to + 16 * (columns - 1), from + (size_t)(columns - 1) * channels, 3); /* never past the last row */
        }
    }
}

/* Resizes `rows` rows along themselves: channels bytes a pixel in, 3 out. */
static void NAME(across)(const uint8_t *in, size_t in_stride, int channels, int32_t rows, const taps_t *taps,
                         int32_t count, uint8_t *strip, uint8_t *out, size_t out_stride) {
    int32_t low, columns; /* low is 0: bounds count from the first column that is read */
    reach(taps, count, &low, &columns);
    memset(strip, 0, (size_t)columns * 16);
    for (int32_t row = 0; row < rows; row += 4) {
        const int here = rows - row < 4 ? rows - row : 4;
        NAME(interleave)(in + row * in_stride, in_stride, channels, here, columns, strip);
        for (int32_t at = 0; at < count; at++) {
            const int32_t *weights = taps->weights + (size_t)at * taps->size;
            uint8_t four[16];
            NAME(sum16)(strip + 16 * taps->bounds[2 * at], 16, weights, taps->bounds[2 * at + 1], four);
            const int bytes = at + 1 < count ? 4 : 3; /* the fourth byte is overwritten by the next pixel */
            uint8_t *to = out + row * out_stride + 3 * (size_t)at;
            if (here == 4 && bytes == 4) {
                memcpy(to, four, 4);
                memcpy(to + out_stride, four + 4, 4);
                memcpy(to + 2 * out_stride, four + 8, 4);
                memcpy(to + 3 * out_stride, four + 12, 4);
            } else {
                for (int each = 0; each < here; each++) memcpy(to + each * out_stride, four + 4 * each, bytes);
            }
        }
    }
}

/* Resizes along the columns: every byte of a row alike; `top` is the source row that `in` begins with. */
static void NAME(down)(const uint8_t *in, size_t in_stride, int32_t bytes, int32_t top, const taps_t *taps,
                       int32_t count, uint8_t *out, size_t out_stride) {
    for (int32_t at = 0; at < count; at++, out += out_stride) {
        const int32_t *weights = taps->weights + (size_t)at * taps->size, number = taps->bounds[2 * at + 1];
        const uint8_t *from = in + (taps->bounds[2 * at] - top) * in_stride;
        int32_t byte = 0;
        for (; byte + 16 <= bytes; byte += 16) NAME(sum16)(from + byte, in_stride, weights, number, out + byte);
        for (; byte < bytes; byte++) {
            int32_t sum = 1 << (BITS - 1);
            for (int32_t tap = 0; tap < number; tap++) sum += from[byte + tap * in_stride] * weights[tap];
            out[byte] = clip(sum);
        }
    }
}

static void NAME(planes)(const uint8_t *in, int32_t pixels, const float *scale, const float *bias, float *out) {
    for (int channel = 0; channel < 3; channel++) {
        const float by = scale[channel], plus = bias[channel];
        for (int32_t at = 0; at < pixels; at++) out[(size_t)channel * pixels + at] = in[3 * (size_t)at + channel] * by + plus;
    }
}
