// The certificates as a machine has them, which may be older than those in tls/ on this computer.
import { X509Certificate } from 'node:crypto'
import type { Probe } from './probe.mts'

export interface InstalledCertificate {
  /** Its file on the machine; a kubeconfig has one inside. */
  file: string
  subject: string
  expires: Date
  /** Whole days; negative if it has expired. */
  daysLeft: number
}

const home = '/var/lib/kubernetes'

/**
 * Reads every certificate that the machine was given. Certificates only: no private key leaves it.
 * Bash alone does it, as each program that it would start takes its time.
 */
export const certificateProbe: Probe<InstalledCertificate[]> = {
  command: `
    cd ${home} 2>/dev/null || exit 0
    for file in pki/*.pem; do
      case $file in *-key.pem | 'pki/*.pem') continue;; esac
      echo "== $file"
      printf '%s\\n' "$(<"$file")"
    done
    for file in *.kubeconfig; do
      [ -e "$file" ] || continue
      echo "== $file"
      while read -r key value; do
        case $key in client-certificate-data:) echo "$value";; esac
      done <"$file"
    done`,
  read(output) {
    const sections = output.split(/^== /m).slice(1)
    return sections.flatMap((section) => {
      const [file = '', ...lines] = section.trim().split('\n')
      const text = lines.join('\n')
      // A public key alone, as service-account.pem may be, has no days to count.
      if (/BEGIN (?!CERTIFICATE)/.test(text) || text === '') return []
      const pem = text.includes('-----') ? text : Buffer.from(text.replaceAll('"', ''), 'base64')
      const { subject, validTo } = new X509Certificate(pem)
      const expires = new Date(validTo)
      const daysLeft = Math.floor((expires.getTime() - Date.now()) / 86_400_000)
      return { file: `${home}/${file}`, subject, expires, daysLeft }
    })
  },
}
