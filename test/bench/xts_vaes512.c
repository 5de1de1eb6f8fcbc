//go:build ignore

/*
 * The yardstick for internal/crypto/xts on processors with VAES and AVX-512:
 * XTS-AES-256 of 512-byte sectors, each with its own tweak, as a plain C loop
 * with intrinsics, one core, in place.
 *
 *	gcc -O3 -march=icelake-client -o xts_vaes512 xts_vaes512.c && ./xts_vaes512
 *
 * It first checks itself against vector 10 of IEEE Std 1619-2018, and then
 * prints, for each request size, the median of seven rounds in 10^9 bytes per
 * second of processor time: the same measure as `strongroom benchmark`.
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ROUNDS = 14, SECTOR = 512, TWEAKS = 8 };

static __m512i data_keys[ROUNDS + 2], tweak_keys[ROUNDS + 2]; /* the last of each is not used */

static __m128i assist_mix(__m128i k, __m128i assist)
{
	k = _mm_xor_si128(k, _mm_slli_si128(k, 4));
	k = _mm_xor_si128(k, _mm_slli_si128(k, 8));
	return _mm_xor_si128(k, assist);
}

#define EXPAND(i, rcon)                                                                         \
	do {                                                                                    \
		a = assist_mix(a, _mm_shuffle_epi32(_mm_aeskeygenassist_si128(b, rcon), 0xFF)); \
		keys[i] = _mm512_broadcast_i32x4(a);                                            \
		b = assist_mix(b, _mm_shuffle_epi32(_mm_aeskeygenassist_si128(a, 0), 0xAA));    \
		keys[(i) + 1] = _mm512_broadcast_i32x4(b);                                      \
	} while (0)

static void expand(__m512i keys[ROUNDS + 2], const uint8_t key[32])
{
	__m128i a = _mm_loadu_si128((const __m128i *)key), b = _mm_loadu_si128((const __m128i *)(key + 16));
	keys[0] = _mm512_broadcast_i32x4(a);
	keys[1] = _mm512_broadcast_i32x4(b);
	EXPAND(2, 0x01);
	EXPAND(4, 0x02);
	EXPAND(6, 0x04);
	EXPAND(8, 0x08);
	EXPAND(10, 0x10);
	EXPAND(12, 0x20);
	EXPAND(14, 0x40);
}

static inline __m512i aes(__m512i x, const __m512i keys[ROUNDS + 1])
{
	x = _mm512_xor_si512(x, keys[0]);
	for (int r = 1; r < ROUNDS; r++)
		x = _mm512_aesenc_epi128(x, keys[r]);
	return _mm512_aesenclast_epi128(x, keys[ROUNDS]);
}

/* t, t x, t x^2, t x^3 of the block t */
static inline __m512i powers(__m128i t)
{
	const __m512i poly = _mm512_set1_epi64(0x87);
	__m512i four = _mm512_broadcast_i32x4(t);
	__m512i carry = _mm512_srlv_epi64(four, _mm512_set_epi64(61, 61, 62, 62, 63, 63, 64, 64));
	__m512i left = _mm512_sllv_epi64(four, _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0));
	left = _mm512_xor_si512(left, _mm512_clmulepi64_epi128(carry, poly, 0x01));
	return _mm512_xor_si512(left, _mm512_bslli_epi128(carry, 8));
}

/* t x^4 */
static inline __m512i next(__m512i t)
{
	const __m512i poly = _mm512_set1_epi64(0x87);
	__m512i carry = _mm512_srli_epi64(t, 60), left = _mm512_slli_epi64(t, 4);
	left = _mm512_xor_si512(left, _mm512_clmulepi64_epi128(carry, poly, 0x01));
	return _mm512_xor_si512(left, _mm512_bslli_epi128(carry, 8));
}

/* encrypts n bytes, a multiple of eight sectors, or one sector */
static void encrypt(uint8_t *p, size_t n, uint64_t iv)
{
	__m128i tweaks[TWEAKS];
	for (size_t s = 0; s < n / SECTOR; s++, p += SECTOR) {
		if (s % TWEAKS == 0) {
			__m512i v = _mm512_set_epi64(0, iv + s + 3, 0, iv + s + 2, 0, iv + s + 1, 0, iv + s);
			__m512i four = _mm512_set_epi64(0, 4, 0, 4, 0, 4, 0, 4);
			_mm512_storeu_si512(tweaks, aes(v, tweak_keys));
			_mm512_storeu_si512(tweaks + 4, aes(_mm512_add_epi64(v, four), tweak_keys));
		}
		__m512i t[8], x[8];
		t[0] = powers(tweaks[s % TWEAKS]);
		for (int i = 1; i < 8; i++)
			t[i] = next(t[i - 1]);
		for (int i = 0; i < 8; i++)
			x[i] = _mm512_xor_si512(_mm512_xor_si512(_mm512_loadu_si512(p + 64 * i), t[i]), data_keys[0]);
		for (int r = 1; r < ROUNDS; r++)
			for (int i = 0; i < 8; i++)
				x[i] = _mm512_aesenc_epi128(x[i], data_keys[r]);
		for (int i = 0; i < 8; i++)
			_mm512_storeu_si512(p + 64 * i, _mm512_xor_si512(_mm512_aesenclast_epi128(x[i], data_keys[ROUNDS]), t[i]));
	}
}

static double seconds(void)
{
	struct timespec t;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return x < y ? -1 : x > y;
}

int main(void)
{
	static const uint8_t key[64] = {
		0x27, 0x18, 0x28, 0x18, 0x28, 0x45, 0x90, 0x45, 0x23, 0x53, 0x60, 0x28, 0x74, 0x71, 0x35, 0x26,
		0x62, 0x49, 0x77, 0x57, 0x24, 0x70, 0x93, 0x69, 0x99, 0x59, 0x57, 0x49, 0x66, 0x96, 0x76, 0x27,
		0x31, 0x41, 0x59, 0x26, 0x53, 0x58, 0x97, 0x93, 0x23, 0x84, 0x62, 0x64, 0x33, 0x83, 0x27, 0x95,
		0x02, 0x88, 0x41, 0x97, 0x16, 0x93, 0x99, 0x37, 0x51, 0x05, 0x82, 0x09, 0x74, 0x94, 0x45, 0x92,
	};
	static const uint8_t want[16] = {0x1c, 0x3b, 0x3a, 0x10, 0x2f, 0x77, 0x03, 0x86, 0xe4, 0x83, 0x6c, 0x99, 0xe3, 0x70, 0xcf, 0x9b};
	static uint8_t buf[1 << 20] __attribute__((aligned(4096)));

	if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("vaes") || !__builtin_cpu_supports("vpclmulqdq")) {
		fprintf(stderr, "this processor has no VAES with AVX-512\n");
		return 2;
	}
	expand(data_keys, key);
	expand(tweak_keys, key + 32);
	for (int i = 0; i < SECTOR; i++)
		buf[i] = i;
	encrypt(buf, SECTOR, 0xFF);
	if (memcmp(buf, want, sizeof want) != 0) {
		fprintf(stderr, "wrong result for vector 10 of IEEE Std 1619\n");
		return 1;
	}

	static const size_t sizes[] = {512, 4096, 65536, 1 << 20};
	for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
		double rates[7];
		size_t calls = (64 << 20) / sizes[s];
		for (int round = 0; round < 7; round++) {
			double start = seconds();
			for (size_t i = 0; i < calls; i++)
				encrypt(buf, sizes[s], 0);
			rates[round] = 1e-9 * sizes[s] * calls / (seconds() - start);
		}
		qsort(rates, 7, sizeof *rates, compare);
		printf("%zu\t%.2f\n", sizes[s], rates[3]);
	}
	return 0;
}
