// An RSA key pair: two random primes and some arithmetic (RFC 8017, section 3).
import { createPrivateKey, generatePrime, type KeyObject } from 'node:crypto'
import { promisify } from 'node:util'

const publicExponent = 65537n

/**
 * A new RSA private key; createPublicKey() of it gives the public half.
 *
 * The primes are OpenSSL's, made on Node's thread pool. generateKeyPair() of OpenSSL 3 builds
 * each of them around further primes (FIPS 186-4, B.3.6), which takes two and a half times as
 * long and, for keys of this size, makes them no harder to factor.
 *
 * @param bits length of the modulus, even
 */
export async function generateRsaKey(bits = 2048): Promise<KeyObject> {
  const [one, other] = await Promise.all([generateFactor(bits / 2), generateFactor(bits / 2)])
  // Primes close together are found by Fermat's method (the bound is FIPS 186-4's, B.3.3).
  const [p, q] = one > other ? [one, other] : [other, one]
  return (p - q) >> BigInt(bits / 2 - 100) === 0n ? generateRsaKey(bits) : privateKeyOf(p, q)
}

/** A prime with its two highest bits set, so that the product of two has twice its length. */
async function generateFactor(bits: number): Promise<bigint> {
  const prime = await promisify(bigPrime)(bits)
  // The public exponent has an inverse only if it does not divide p - 1.
  return prime % publicExponent === 1n ? generateFactor(bits) : prime
}

function bigPrime(bits: number, done: (error: Error | null, prime: bigint) => void): void {
  generatePrime(bits, { bigint: true }, done)
}

function privateKeyOf(p: bigint, q: bigint): KeyObject {
  const d = inverse(publicExponent, (p - 1n) * (q - 1n))
  const parts = {
    n: p * q,
    e: publicExponent,
    d,
    p,
    q,
    dp: d % (p - 1n),
    dq: d % (q - 1n),
    qi: inverse(q, p),
  }
  const jwk = Object.entries(parts).map(([name, value]) => [name, base64url(value)])
  return createPrivateKey({ key: { kty: 'RSA', ...Object.fromEntries(jwk) }, format: 'jwk' })
}

/** The x with number * x = 1 (mod modulus), by Euclid's algorithm. */
function inverse(number: bigint, modulus: bigint): bigint {
  let [a, b] = [modulus, number % modulus]
  let [x, y] = [0n, 1n]
  while (b !== 0n) {
    const quotient = a / b
    ;[a, b] = [b, a - quotient * b]
    ;[x, y] = [y, x - quotient * y]
  }
  return x < 0n ? x + modulus : x
}

function base64url(value: bigint): string {
  const hex = value.toString(16)
  return Buffer.from(hex.padStart(hex.length + (hex.length % 2), '0'), 'hex').toString('base64url')
}
