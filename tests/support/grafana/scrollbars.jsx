// In place of react-custom-scrollbars-2, which measures before a headless browser has laid out.
export default function Scrollbars({ children }) {
  return <div style={{ height: '100%', width: '100%', overflow: 'hidden' }}>{children}</div>;
}
